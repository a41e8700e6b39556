"""Prompts, suites, pools, attacks and conversations: text in, frozen rows out.

Nothing here knows a model. Import from the module that holds the name.
"""
