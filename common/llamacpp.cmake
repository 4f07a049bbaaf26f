# Included by CMake when llama-cpp-python is compiled: it would build the command-line helpers otherwise.
set(LLAMA_BUILD_COMMON OFF)
# Its own threads instead of OpenMP's, which here wait asleep (OMP_WAIT_POLICY, see the Makefile): hundreds of waits
# per token made llama.cpp 3 to 5 times slower.
set(GGML_OPENMP OFF CACHE BOOL "" FORCE)
