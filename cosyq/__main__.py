from cosyq.cli import main

main()
