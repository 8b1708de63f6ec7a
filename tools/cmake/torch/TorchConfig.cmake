# Stands in for torch's own TorchConfig.cmake, which demands the CUDA toolkit that torch was built with, even for
# an extension without a line of CUDA. Defines the `torch` target and the variables that find_package(Torch) promises.
execute_process(
  COMMAND "${PYTHON_EXECUTABLE}" -c
          "import os, torch; print(os.path.dirname(torch.__file__), int(torch._C._GLIBCXX_USE_CXX11_ABI), sep=';')"
  OUTPUT_STRIP_TRAILING_WHITESPACE
  OUTPUT_VARIABLE torch_facts
  RESULT_VARIABLE torch_status)
if(NOT torch_status EQUAL 0)
  message(FATAL_ERROR "torch does not import in ${PYTHON_EXECUTABLE}")
endif()
list(GET torch_facts 0 torch_root)
list(GET torch_facts 1 torch_abi)

set(TORCH_FOUND TRUE)
set(Torch_FOUND TRUE)
set(TORCH_INCLUDE_DIRS "${torch_root}/include" "${torch_root}/include/torch/csrc/api/include")
set(TORCH_CXX_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=${torch_abi}")
if(NOT TARGET torch)
  add_library(torch INTERFACE IMPORTED GLOBAL)
  set_target_properties(torch PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${TORCH_INCLUDE_DIRS}"
    INTERFACE_COMPILE_OPTIONS "${TORCH_CXX_FLAGS}"
    INTERFACE_LINK_LIBRARIES "${torch_root}/lib/libtorch.so;${torch_root}/lib/libtorch_cpu.so;${torch_root}/lib/libc10.so")
endif()
set(TORCH_LIBRARIES torch)
