"""The rules judge: what an English answer says, read by written rules."""
