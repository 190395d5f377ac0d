import shutil

from tasks.reports.verify import verify


def test_a_run_inside_anothers_folder_is_not_looked_at(train, tmp_path):
    folder, _ = train("good", rounds=1)
    alone = verify(folder)
    shutil.copytree(folder, tmp_path / "inner")
    shutil.move(tmp_path / "inner", folder / "inner")
    assert verify(folder) == alone
    assert alone.problems == []
