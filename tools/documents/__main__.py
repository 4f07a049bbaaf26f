from tools.documents.check import main

main()
