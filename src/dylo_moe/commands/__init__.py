"""The commands of ``dylora-moe``, one file each: ``main(arguments, program)`` returns an exit code."""
