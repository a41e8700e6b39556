"""The guard as a server: answers that are watched while they are written."""
