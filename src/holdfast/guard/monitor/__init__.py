"""The monitor: detectors that read an answer while it is written, and can stop it."""
