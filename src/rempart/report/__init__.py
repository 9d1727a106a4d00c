"""The one report: its schema, and how it is stored, drawn, told in words, shown as a page, compared and gated."""
