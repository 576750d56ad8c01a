"""The `acdc` command: subcommands, arguments, the launcher. What they do is elsewhere, a call away."""
