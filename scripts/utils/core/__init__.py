"""Core: errors, files, records, arguments, the command line, the machine and its worker processes.

  errors        The one exception for mistakes in what the user gives, and how several are reported together
  files         output that is complete or absent, one run at a time, JSON, and hashes
  records       files of records and of documents, read as streams, with errors that name file and line
  arguments     the dataclasses that scripts share, each checking its own values
  command_line  flags and config files into dataclasses, what a run records of them, and how a script ends
  old_flags     the spellings of the forerunners and of older libraries, and what they mean today
  machine       cores and memory this process may use, what it used, and whether Ctrl-C reaches it
  workers       Worker processes for long, independent pieces of work: results in order, memory bounded, no orphans
  figures       pictures in png files, in fonts that have Chinese, without pyplot
  language      the language that a person reads, from the shell, and the FAQ's entry on an error in it
  hub           whether a name is a folder or a hub id, and what a hub id names, downloaded or from the cache
  installation  required packages and what is there, whether they can be imported, processor, GPUs, compiler, network
  downloads     what a repository of a hub holds, which of it is wanted, files that come whole and checked
  typed_json    JSON values as dataclasses: what is missing, or of another type, is named with its file and field

Others import: errors, files, records, arguments, command_line, machine, workers, figures, language, hub, installation,
downloads, typed_json.
"""
