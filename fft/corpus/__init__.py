"""Raw files to parts of a token table, wherever that runs: in a Spark task or in a process of the trainer's machine."""
