"""Core: errors, files, records, arguments, the command line, the machine and its worker processes.

  errors        The one exception for mistakes in what the user gives, and how several are reported together
  files         atomic output, hashes, and reading txt, json, jsonl and parquet with errors that name file and line
  typed_json    JSON values as dataclasses: what is missing, or of another type, is named with its file and field
  figures       pictures in png files, in fonts that have Chinese, without pyplot
  records       A JSON file read value by value, with only the part in work in memory, and errors that know line and
                column
  arguments     the dataclasses scripts share, one parser (command line > YAML/JSON file > default), and old
                spellings
  command_line  flags and config files into dataclasses, what a run records of them, and how a script ends
  old_flags     the spellings of the forerunners and of older libraries, and what they mean today
  machine       cores and memory this process may use, what it used, and whether Ctrl-C reaches it
  workers       Worker processes for long, independent pieces of work: results in order, memory bounded, no orphans

Others import: errors, files, typed_json, figures, records, arguments, command_line, machine, workers.
"""
