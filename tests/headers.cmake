# Every header compiles alone, twice in one file: it includes what it needs and is guarded. Not part of the default
# build: the test "headers" builds the target. The one place that finds files by pattern, because a header that is on
# no list is what it looks for.
set(_sluice_header_flags_simd_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma)
set(_sluice_header_flags_simd_avx2 -mavx2 -mfma)

add_custom_target(sluice_headers)
foreach(room base scheduler comm kernels runtime)
  if(NOT TARGET sluice_${room})
    continue()
  endif()
  file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE "${PROJECT_SOURCE_DIR}" "${PROJECT_SOURCE_DIR}/${room}/*.hpp")
  set(sources)
  foreach(header IN LISTS headers)
    # Public headers of runtime are included without the room's name.
    string(REGEX REPLACE "^runtime/include/sluice/" "" written "${header}")
    string(MAKE_C_IDENTIFIER "${header}" name)
    set(source "${CMAKE_CURRENT_BINARY_DIR}/headers/${name}.cpp")
    file(CONFIGURE OUTPUT "${source}" @ONLY NEWLINE_STYLE UNIX
         CONTENT "#include \"sluice/@written@\"\n#include \"sluice/@written@\"  // guarded\n")
    get_filename_component(stem "${header}" NAME_WE)
    if(DEFINED _sluice_header_flags_${stem})
      set_source_files_properties("${source}" PROPERTIES COMPILE_OPTIONS "${_sluice_header_flags_${stem}}")
    endif()
    list(APPEND sources "${source}")
  endforeach()
  if(sources)
    add_library(sluice_headers_${room} OBJECT EXCLUDE_FROM_ALL ${sources})
    target_link_libraries(sluice_headers_${room} PRIVATE sluice_${room} sluice_flags)
    target_compile_options(sluice_headers_${room} PRIVATE -Wno-unused-function)
    add_dependencies(sluice_headers sluice_headers_${room})
  endif()
endforeach()

add_test(NAME headers COMMAND ${CMAKE_COMMAND} --build "${CMAKE_BINARY_DIR}" --target sluice_headers)
set_tests_properties(headers PROPERTIES LABELS slow TIMEOUT 600)
