"""The search for the best way to quantize one model, on validation images: all of Optuna is here.

In the order in which data passes through: job.py is the whole job, setup.py what comes before the first trial,
storage.py where a study is kept, journal.py its file after a kill, study.py the study, queue.py its trials and who does
them, trials.py one trial after the other, results.py the types, conclusion.py the statistics, findings.py tables,
figures and words.
"""

from qexp.search.job import run_search as run_search
