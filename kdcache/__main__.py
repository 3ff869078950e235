"""``python -m kdcache`` is the ``kdcache`` command."""

from kdcache.cli.main import main

if __name__ == "__main__":
    main()
