"""HTML pages that show what improved and what was hacked."""
