"""The audit: every stage in order, the report and its page, two reports compared."""
