from loku.cli import main

main()
