"""Which pods there are: what the configuration, files, DNS and operators list, brought together, and kept up to date."""
