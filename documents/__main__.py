from documents.check import main

main()
