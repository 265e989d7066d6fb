"""The console command, the arguments of ``train``, its dry run, and the terminal."""
