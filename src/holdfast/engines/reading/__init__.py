"""Reading elsewhere: hidden states by other processes, machines and engines."""
