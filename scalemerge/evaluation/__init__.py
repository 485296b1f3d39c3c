"""MTEB-style scores of any model folder, on local data or on hub tasks, and the results.json they go into.

    definitions.py  what a task and a suite are            suites.py   the ready suites, and `check`
    reading.py      files -> rows: validation and caps     tasks.py    rows -> mteb tasks
    revision.py     what identifies a model's weights      model.py    our encoder behind mteb's interface
    scorer.py       `evaluate`: runs mteb, resumably       results.py  results.json

mteb takes 10 s to import, so only tasks.py and model.py import it, and only `evaluate` imports those.
"""
