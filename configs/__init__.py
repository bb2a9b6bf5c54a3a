"""The presets: YAML files that list what differs from the defaults of `longvid.settings`."""
