"""Core: errors, files, records, arguments, the command line, the machine and its worker processes.

  errors        The one exception for mistakes in what the user gives, and how several are reported together
  files         atomic output, hashes, and reading txt, json, jsonl and parquet with errors that name file and line
  records       files of records and of documents, read as streams, with errors that name file and line
  arguments     the dataclasses that scripts share, each checking its own values
  command_line  flags and config files into dataclasses, what a run records of them, and how a script ends
  old_flags     the spellings of the forerunners and of older libraries, and what they mean today
  machine       cores and memory this process may use, what it used, and whether Ctrl-C reaches it
  workers       Worker processes for long, independent pieces of work: results in order, memory bounded, no orphans

Others import: errors, files, records, arguments, command_line, machine, workers.
"""
