"""Writes every part of README.md and docs/ that is made from results: `python -m docs.render`.

pages          the table: which part of which page, from which file, by which function
markers        parts of a page, and Markdown tables
benchmarks     speed, growth, load, end to end
families       the denoisers that the package knows
studies        results of `negtome-fast demo` and `negtome-fast eval`
nudging        docs/nudging.md
variants       docs/beyond.md
coverage       docs/measures.md
applications   docs/applications.md
"""
