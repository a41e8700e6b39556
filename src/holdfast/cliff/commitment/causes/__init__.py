"""What decides an outcome: thinking, edits and directions, taken apart by draws."""
