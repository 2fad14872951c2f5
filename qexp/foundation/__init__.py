"""What every stage stands on, and no stage of its own: text and tables, files that others wrote, processes and threads.

With config.py, errors.py, files.py and progress.py beside it, it is below all packages, and imports none of them.
"""
