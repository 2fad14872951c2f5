"""The report: results.py puts together what the stages have found, page.py makes the files of it.

Between them are sentences.py, tables.py, figures.py (PNG files) and chart.py (the interactive chart in the page);
templates/ has the order of the page and its text. `tracking/` logs the files.
"""
