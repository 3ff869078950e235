"""A first recipe for one's own data: ``kdcache init``.

    columns.py    which columns hold the text and the label, and why
    files.py      which file is train, validation, test or transfer
    models.py     what a model is, from its config; the models that are proposed
    lengths.py    how long the texts are, in tokens
    writing.py    a commented recipe, which kdcache itself loads
    costs.py      a rough estimate of time and disk
    draft.py      all of these, one after the other

Every guess is said with its reason, and the recipe is loaded with its data before it is written.
"""
