"""Values that describe and judge what is there: a GGUF's findings, a model's description, a repair.

``audit_gguf`` is ``pi-convert check``, ``describe`` is ``inspect``, ``plan_repair`` is ``fix`` and
``survey_environment`` is ``doctor``. None of them reads weights or prints.
"""
