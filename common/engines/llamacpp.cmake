# Included by CMake when llama-cpp-python is compiled: it would build the command-line helpers otherwise.
set(LLAMA_BUILD_COMMON OFF)
# Its own threads instead of OpenMP's, which here wait asleep (OMP_WAIT_POLICY, see the Makefile): hundreds of waits
# per token made llama.cpp 3 to 5 times slower.
set(GGML_OPENMP OFF CACHE BOOL "" FORCE)
# ggml's kernels for Intel's AMX die of a general protection fault at the first quantized prompt of 8 or more tokens
# (ggml-org/llama.cpp#26954): without them the same files work.
include(CheckCCompilerFlag)
foreach(amx tile int8 bf16)
    check_c_compiler_flag(-mno-amx-${amx} HAS_NO_AMX_${amx})
    if(HAS_NO_AMX_${amx})
        string(APPEND CMAKE_C_FLAGS " -mno-amx-${amx}")
        string(APPEND CMAKE_CXX_FLAGS " -mno-amx-${amx}")
    endif()
endforeach()
