# Builds llama.cpp for the CPU at hand, upstream's default, instead of a generic one: without it the peer has no AVX-512
# and a comparison with it is not fair. Included by CMake after `project()`, before llama.cpp reads its options.
if(NOT CMAKE_CROSSCOMPILING)
  set(GGML_NATIVE ON CACHE BOOL "optimize for the current system" FORCE)
endif()
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  add_compile_options(-include "${CMAKE_CURRENT_LIST_DIR}/peers/tile_config.h")
endif()
