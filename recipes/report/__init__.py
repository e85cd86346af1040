"""Results for people: Markdown, HTML pages and plots."""
