# Included by CMake when llama-cpp-python is compiled: it would build the command-line helpers otherwise.
set(LLAMA_BUILD_COMMON OFF)
