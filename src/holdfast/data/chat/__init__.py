"""Chats: templates and what they render, the thinking in them, and conversations."""
