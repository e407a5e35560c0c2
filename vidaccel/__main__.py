from vidaccel.cli.main import main

main()
