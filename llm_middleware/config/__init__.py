"""Settings from a file: `load.load_config` reads LiteLLM's ``config.yaml`` as it is, or a shorter form."""
