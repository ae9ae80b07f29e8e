"""One script per published claim; each prints its numbers, the last line as JSON."""
