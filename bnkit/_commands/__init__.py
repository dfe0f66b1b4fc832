"""The commands of the command line, a file each: parse, call one function, print."""
