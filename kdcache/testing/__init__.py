"""Support for tests of kdcache and of tools built on it: tiny models, contract test classes, fault injectors."""
