"""fastseq in other libraries' models, a module for each; such a library is imported only where its module is."""
