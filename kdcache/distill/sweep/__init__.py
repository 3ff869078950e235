"""A sweep: many students from one cache, each trained like ``kdcache distill`` does, in a directory of its own.

    cells.py      the section [sweep] to cells and students; names of their directories
    running.py    the students in one process or several; a failing one does not stop the others
    search.py     cells that are proposed from the results so far
    stage.py      all of it: what is there is not trained again, the rest is, and the table is written

The directory of a student is named by a digest of its settings and by its seed. So a sweep has no state besides the
students: killed at any moment, the same command finds what is finished and resumes what was begun.
"""
