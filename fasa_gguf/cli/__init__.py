"""The command line. Command modules parse, call and print; the work is in the library.

main builds the parser, arguments holds the flags and argparse types that commands share. Every other module adds its
commands through `add_commands(command)`, where `command(name, run, help, example)` returns the new subparser.
"""
