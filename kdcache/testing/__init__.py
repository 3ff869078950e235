"""What tests of kdcache, and of tools built on it, stand on: tiny models, contract test classes, fault injectors."""
