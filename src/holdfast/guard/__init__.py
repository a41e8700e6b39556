"""The guard: detectors of harmful answers by their dynamics, and their thresholds."""
