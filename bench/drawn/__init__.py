"""Results as text, as a comparison of two files, as plots and as an HTML page."""
