"""The server as HTTP: routes, what they take, and what stands before them."""
