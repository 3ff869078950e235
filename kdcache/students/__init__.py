"""A student: built, cut to size, saved and scored."""
