"""The command line: verbs to stages, flags to settings, errors to exit statuses.

Nothing heavy is imported before a verb runs, so that help is there at once.
"""
