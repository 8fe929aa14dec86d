"""What is printed and drawn from results: text, comparisons of two files, plots, an HTML page."""
