"""The command line: verbs to stages, flags to settings, errors to exit statuses.

No tensor library is imported before a verb runs, so that help is there at once.
"""
